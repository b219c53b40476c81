"""One thread, and bf16 products in bf16 on every processor."""

from support.policies import bf16_products, few_threads

__all__ = ["bf16_products", "few_threads"]
