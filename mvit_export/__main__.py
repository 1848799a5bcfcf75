from mvit_export.cli.main import main

if __name__ == "__main__":
    main()
