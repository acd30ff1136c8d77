"""Is a checkpoint whole, would vLLM serve it, and does it agree with its original?"""

from .report import Check, Verification
from .verifier import verify

__all__ = ["Check", "Verification", "verify"]
