"""Neural memories and the plain parts they need, as `torch.nn` modules."""
