"""The model: loaded, quantized, run forward, adapted, checked and merged."""
