"""The search for scan directions (paper section 4.2)."""
from mmlocalmamba.search.mixed_scan import CANDIDATES, MixedScan

__all__ = ['CANDIDATES', 'MixedScan']
