"""OpenRLHF's own PPO loop on a machine without a GPU.

`driver` is the one process that starts Ray and calls OpenRLHF; `patches` is the table of what stands in for CUDA;
`nursery` makes Ray's workers by fork, so that the imports are paid once; `site` holds the packages that stand in for
vLLM and flash-attention. No file of OpenRLHF is changed. A GPU of the machine is hidden from the twin's processes; in
one that sees a GPU the table is not put in force.
"""
