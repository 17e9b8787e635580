"""The search for scan directions (paper section 4.2): the supernet, and the results of a search."""
from mmlocalmamba.directions import CANDIDATES
from mmlocalmamba.search.supernet import MixedScan

__all__ = ['CANDIDATES', 'MixedScan']
