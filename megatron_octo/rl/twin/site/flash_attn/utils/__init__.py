"""Names of flash_attn.utils."""
