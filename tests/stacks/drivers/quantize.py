"""llama.cpp's quantization: `quantize.py IN.gguf OUT.gguf Q4_K_M`."""

import sys

from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize

FORMS = {"Q8_0": 7, "Q4_K_M": 15}
"""`llama_ftype` of llama.h."""

if __name__ == "__main__":
    source, target, form = sys.argv[1:]
    params = LlamaModelQuantizeParams()
    params.ftype = FORMS[form]
    model_quantize(source, target, params)
