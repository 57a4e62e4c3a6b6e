from turbokv.cli import main

main()
