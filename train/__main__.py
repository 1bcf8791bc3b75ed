"""`python -m train`."""

from train.cli import leave, main

if __name__ == "__main__":
    leave(main())
