"""Models from and to other formats.

from_checkpoint  a checkpoint of a run, as models
convert_tf       TensorFlow 1 checkpoints of the original
tf_bundle        reads their variables
onnx_export      fine-tuned models to ONNX
onnx_model       runs such a file with onnxruntime
"""
