"""Before a training: what would go wrong? Builds everything, looks at the data, makes two steps; nothing is trained.

`python -m mmlocalmamba check CONFIG` and `mim run mmlocalmamba check CONFIG` are the same.
"""
import sys

from mmlocalmamba.__main__ import main

if __name__ == '__main__':
    sys.argv.insert(1, 'check')
    main()
