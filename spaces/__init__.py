DISTRIBUTION = "hyq-search"
