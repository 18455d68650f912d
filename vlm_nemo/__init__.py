"""vlm_nemo: train your own vision-language model on megatron-core, from a laptop's CPU to a cluster."""

import logging
import warnings

# megatron-core warns once per absent optional kernel (TransformerEngine, apex). Absence is a choice here, not news;
# the filters must stand before its first import.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"megatron\.core")
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.jit")
# What megatron-core 0.16.1 does under a newer torch than its own.
warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+_tensor` is deprecated")
warnings.filterwarnings("ignore", category=UserWarning, message=r"The \.grad attribute of a Tensor that is not a leaf")
# On a machine with the CUDA toolkit and no GPU, torch announces that once a process.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

__version__ = "0.1.0"
