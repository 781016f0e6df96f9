"""Files that an export ships: PyTorch code that stands alone in its folder. Nothing here imports them."""
