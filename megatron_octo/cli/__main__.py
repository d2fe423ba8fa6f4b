"""`python -m megatron_octo.cli`: the same as `octo`."""

from megatron_octo.cli.root import main

main()
