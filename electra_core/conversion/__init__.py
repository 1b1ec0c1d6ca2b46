"""Other formats of models.

convert_tf   TensorFlow 1 checkpoints of the original
tf_bundle    reads their variables
onnx_export  fine-tuned models to ONNX
onnx_model   runs such a file with onnxruntime
"""
