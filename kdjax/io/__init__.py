"""What a training reads and writes: batches, checkpoints, logs.

Import the modules you need; each loads its own libraries:

- :mod:`kdjax.io.input`: batches from arrays, on Grain.
- :mod:`kdjax.io.checkpoints`: checkpoints that resume bit for bit, on Orbax.
- :mod:`kdjax.io.weights`: tensors of Hugging Face's folders, on safetensors.
- :mod:`kdjax.io.alignment`: two tokenizations of one text, on NumPy.
- :mod:`kdjax.io.logs`: metrics as JSON lines, TensorBoard events, a progress bar.
- :mod:`kdjax.io.files`: files that are there whole or not at all.
"""
