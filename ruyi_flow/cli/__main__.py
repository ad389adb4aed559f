"""`python -m ruyi_flow.cli`."""

from ruyi_flow.cli import main

if __name__ == "__main__":
    main()
