"""The console: the job service's pages for people. Server-rendered; what they do without JavaScript is everything."""
