"""The edge: the only modules of hf_efcp that import Hugging Face packages."""
