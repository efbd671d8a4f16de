from cs336_systems.cli import main

main()
