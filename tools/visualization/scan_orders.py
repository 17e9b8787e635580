"""Draw the order in which scan directions read the tokens of an image.

    python tools/visualization/scan_orders.py --out scan_orders.png
    python tools/visualization/scan_orders.py --directions h v w3 w3_flip --size 9 12 --image photo.jpg --out fig1.png
    python tools/visualization/scan_orders.py --distances --directions h v w2 w7 --out scan_distances.png
"""
import argparse

import numpy as np

from mmlocalmamba.scans import check_scan
from mmlocalmamba.search import CANDIDATES
from mmlocalmamba.visualization import draw_scan_distances, draw_scan_orders


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--directions', nargs='+', metavar='NAME', default=CANDIDATES, help='scan names')
    parser.add_argument('--size', nargs=2, type=int, metavar=('H', 'W'), default=(14, 14), help='token grid')
    parser.add_argument('--image', help='picture to draw on (default: none)')
    parser.add_argument('--distances', action='store_true',
                        help='how many steps each token is away from one of them, instead of the path')
    parser.add_argument('--out', required=True, help='file to write; the ending chooses the format')
    args = parser.parse_args()
    for name in args.directions:
        try:
            check_scan(name)
        except ValueError as error:
            parser.error(str(error))
    if min(args.size) < 1:
        parser.error(f'--size needs two numbers >= 1, got {args.size}')
    image = None
    if args.image:
        from PIL import Image
        image = np.asarray(Image.open(args.image).convert('RGB'))
    figure = (draw_scan_distances(args.directions, *args.size) if args.distances else
              draw_scan_orders(args.directions, *args.size, image=image))
    figure.savefig(args.out, dpi=120)
    print(f'scan {"distances" if args.distances else "orders"} of {", ".join(args.directions)} on '
          f'{args.size[0]}x{args.size[1]} tokens: {args.out}')


if __name__ == '__main__':
    main()
