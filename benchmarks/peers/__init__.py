"""What `smolvla-fast bench --suite cpu` is made of: policies that share weights, gates, peers, scaling, overhead, report."""
