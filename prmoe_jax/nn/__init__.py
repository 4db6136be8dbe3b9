"""Parts of models: parameters, matrix products, MLPs, norms, quantization, rematerialisation."""
