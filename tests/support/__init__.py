"""What tests share: policies, inputs, contracts, and what plays a GPU or another processor."""
