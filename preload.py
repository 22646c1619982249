"""Options that Atelier adds to the command line of the WebUI."""


def preload(parser):
    """Called by the WebUI before it reads its command line."""
    parser.add_argument(
        "--atelier-data-root",
        type=str,
        default=None,
        help="the only folder Atelier reads training pictures from when the WebUI listens beyond this machine",
    )
