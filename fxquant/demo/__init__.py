"""Small trained models and a seeded data set to try the compiler on without any download."""
