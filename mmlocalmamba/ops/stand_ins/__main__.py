"""``python -m mmlocalmamba.ops.stand_ins SCRIPT ...``: run a script or a module with the stand-ins, unchanged."""
import argparse
import runpy
import sys
from pathlib import Path

from mmlocalmamba.ops.stand_ins import stand_in_for


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m mmlocalmamba.ops.stand_ins', description=__doc__)
    parser.add_argument('--replace', action='store_true', help='replace installed packages, too')
    program = parser.add_mutually_exclusive_group(required=True)
    program.add_argument('-m', dest='module', nargs=argparse.REMAINDER, help='module and its arguments')
    program.add_argument('script', nargs='?', help='script')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='arguments of the script')
    args = parser.parse_args()
    if args.module == []:
        parser.error('-m needs a module')
    stand_in_for(replace=args.replace)
    if args.module is not None:
        sys.argv = args.module
        runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
    else:
        sys.argv = [args.script, *args.arguments]
        sys.path[0] = str(Path(args.script).resolve().parent)  # as python does
        runpy.run_path(args.script, run_name='__main__')


if __name__ == '__main__':
    main()
