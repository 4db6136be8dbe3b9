"""What models are made of: parameters, matrix products, MLPs, what the backward pass keeps."""
