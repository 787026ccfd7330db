"""What a training reads and writes: batches, checkpoints, logs.

Each module stands alone and imports one library; import the ones you need:

- :mod:`kdjax.io.input`: batches from arrays, on Grain.
- :mod:`kdjax.io.checkpoints`: checkpoints that resume bit for bit, on Orbax.
- :mod:`kdjax.io.weights`: tensors of Hugging Face's folders, on safetensors.
- :mod:`kdjax.io.alignment`: two tokenizations of one text, on NumPy.
- :mod:`kdjax.io.logs`: metrics as JSON lines, TensorBoard events, a progress bar.
"""
