"""The console entry: kept thin, because classes defined here would be `__main__.X` and unusable from YAML."""

from nernlit.cli import main

if __name__ == "__main__":
    main()
