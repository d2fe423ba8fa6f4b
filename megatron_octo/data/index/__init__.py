"""From documents to tokens that Megatron-Core reads: encoding, indexed pairs, joining, checking."""
