"""What several parts of the package share and what is about none of them."""
