"""The search for scan directions (paper section 4.2)."""
from mmlocalmamba.scans import CANDIDATES
from mmlocalmamba.search.supernet import MixedScan

__all__ = ['CANDIDATES', 'MixedScan']
