"""Names of flash_attn.bert_padding."""

from flash_attn import absent

index_first_axis = pad_input = rearrange = unpad_input = absent
