"""electra_kernels: the performance-critical operations, each with a readable twin and a Triton kernel."""

from electra_kernels.attention import attention
from electra_kernels.bias_gelu import bias_gelu
from electra_kernels.dispatch import available, use
from electra_kernels.embedding_layer_norm import embedding_layer_norm
from electra_kernels.layer_norm import dropout_add_layer_norm, dropout_add_layer_norm_twice
from electra_kernels.mlm_head import MLMHead, mlm_head
from electra_kernels.rtd_loss import RTDHead, RTDLoss, rtd_head, rtd_loss, rtd_loss_and_counts
from electra_kernels.sample_replace import SampledTokens, sample_and_replace

__all__ = [
    "MLMHead",
    "RTDHead",
    "RTDLoss",
    "SampledTokens",
    "attention",
    "available",
    "bias_gelu",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_twice",
    "embedding_layer_norm",
    "mlm_head",
    "rtd_head",
    "rtd_loss",
    "rtd_loss_and_counts",
    "sample_and_replace",
    "use",
]
