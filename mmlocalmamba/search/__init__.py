"""The search for scan directions (paper section 4.2)."""
from mmlocalmamba.search.supernet import CANDIDATES, MixedScan

__all__ = ['CANDIDATES', 'MixedScan']
