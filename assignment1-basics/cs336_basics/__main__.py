from cs336_basics.cli import main

main()
