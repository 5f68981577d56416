"""`python -m crossdiff`."""

from crossdiff.cli import main

if __name__ == "__main__":
    main()
