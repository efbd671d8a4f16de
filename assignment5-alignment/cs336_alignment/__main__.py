from cs336_alignment.cli import main

if __name__ == "__main__":
    main()
