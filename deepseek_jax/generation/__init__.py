"""Text generation: prefill and decode, sampling, multi-token-prediction drafts."""
