"""Backends that compute logits, sums and gradients over the class weights: plain PyTorch and Triton kernels."""
