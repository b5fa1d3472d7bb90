"""`python -m service` is `timetuner`, for our own tests."""

from service.cli import main

main()
