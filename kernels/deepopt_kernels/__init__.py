"""Operations with a PyTorch reference each: torch and triton only."""
