"""Check a training before it starts: build everything, read the data, make two steps. Nothing is trained.

`python -m mmlocalmamba check CONFIG` and `mim run mmlocalmamba check CONFIG` do the same.
"""
import sys

from mmlocalmamba.__main__ import main

if __name__ == '__main__':
    sys.argv.insert(1, 'check')
    main()
