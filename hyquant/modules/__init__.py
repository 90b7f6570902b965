"""The nn.Module that takes a Linear's place, and how modules are exchanged and put back."""
