"""The fused loss, the cached teacher and what other trainers need beside them. Imports neither
transformers nor peft."""
