"""What goes over the class weights: one interface, in plain PyTorch and by Triton kernels."""
