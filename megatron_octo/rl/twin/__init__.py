"""OpenRLHF's own PPO loop on a machine without a GPU.

`driver` is the one process that starts Ray and calls OpenRLHF; `patches` is the table of what stands in for CUDA;
`nursery` makes Ray's workers by fork, so that the imports are paid once; `site` holds the packages that stand in for
vLLM and flash-attention. No file of OpenRLHF is changed, and where CUDA is present nothing here takes effect.
"""
