"""A Triton backend in name only: under the interpreter nothing is compiled or launched."""
