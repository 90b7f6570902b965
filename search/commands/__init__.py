"""The commands of `hyq-search`, grouped by what they are about; `search.cli` lists them."""
