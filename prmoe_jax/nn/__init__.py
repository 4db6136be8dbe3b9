"""Parts of models: parameters, matrix products, MLPs, quantization, rematerialisation."""
